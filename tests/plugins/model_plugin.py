# The five examples of the model plugin guide as it prints them; the formatter keeps off. Changed: the import line,
# what stands between `# filled in` and `# end` (the guide leaves it to the reader), and the guide's own slips, `# slip:`.
# fmt: off
"""The classes that a reader of the plugin guide ends up with, in the module that the guide's YAML names."""

from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn

from sdconvert.plugins import MultiPluginBlock, PatchPluginBlock, PatchPluginContainer, PluginBlock, SinglePluginBlock


# filled in
class LinearLayer(nn.Module):
    def __init__(self, host, rank, bias, dropout, block):
        super().__init__()
        self.rank = rank
        self.lora_down = nn.Linear(host.in_features, rank, bias=bias)
        self.lora_up = nn.Linear(rank, host.out_features, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.lora_up(self.lora_down(x)))


class Conv2dLayer(nn.Module):
    def __init__(self, host, rank, bias, dropout, block):
        super().__init__()
        self.rank = rank
        self.lora_down = nn.Conv2d(host.in_channels, rank, host.kernel_size, host.stride, host.padding, bias=bias)
        self.lora_up = nn.Conv2d(rank, host.out_channels, 1, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.lora_up(self.lora_down(x)))


class HadamardLayer(nn.Module):
    def __init__(self, host, rank, bias, dropout, block):
        super().__init__()
        self.rank = rank
        rows, columns = host.weight.flatten(1).shape
        self.w_up = nn.Parameter(torch.randn(block.rank_groups_raw, rows, rank) * 0.3)
        self.w_down = nn.Parameter(torch.randn(block.rank_groups_raw, rank, columns) * 0.3)

    def forward(self, host_param):
        return (self.w_up @ self.w_down).prod(0).view_as(host_param)
# end


class LoraBlock(SinglePluginBlock):
    wrapable_classes = [nn.Linear, nn.Conv2d]
    # filled in
    LinearLayer, Conv2dLayer = LinearLayer, Conv2dLayer
    # end

    def __init__(self, lora_id:int, host:Union[nn.Linear, nn.Conv2d], rank, dropout=0.1, alpha=1.0, bias=False,
                 inplace=True, hook_param=None, alpha_auto_scale=True, **kwargs):
        super().__init__(f'lora_block_{lora_id}', host, hook_param)

        self.mask_range = None
        self.inplace=inplace
        self.bias=bias

        if isinstance(host, nn.Linear):
            self.host_type = 'linear'
            self.layer = self.LinearLayer(host, rank, bias, dropout, self)
        elif isinstance(host, nn.Conv2d):
            self.host_type = 'conv'
            self.layer = self.Conv2dLayer(host, rank, bias, dropout, self)
        else:
            raise NotImplementedError(f'No lora for {type(host)}')
        self.rank = self.layer.rank

        self.register_buffer('alpha', torch.tensor(alpha/self.rank if alpha_auto_scale else alpha))

    # slip: the guide indents this method into __init__
    def forward(self, fea_in:Tuple[torch.Tensor], fea_out:torch.Tensor):
        return fea_out + self.layer(fea_in[0]) * self.alpha


class LohaLayer(LoraBlock):
    # filled in
    LinearLayer = Conv2dLayer = HadamardLayer
    # end

    def __init__(self, lora_id:int, host, rank=1, dropout=0.1, alpha=1.0, bias=False, inplace=True, rank_groups=2, alpha_auto_scale=True, **kwargs):
        self.rank_groups_raw = rank_groups
        super().__init__(lora_id, host, rank, dropout, alpha, bias, inplace, hook_param='weight', alpha_auto_scale=alpha_auto_scale)

    def forward(self, host_param: nn.Parameter):
        return host_param + self.layer(host_param) * self.alpha


class Skip(PluginBlock):

    def __init__(self, name, from_layer:Dict[str, Any], to_layer:Dict[str, Any], **kwargs):
        super().__init__(name, from_layer, to_layer)
        self.layer = nn.Linear(from_layer['layer'].in_features, to_layer['layer'].out_features)

    def forward(self, fea_from_in:Tuple[torch.Tensor], fea_in:Tuple[torch.Tensor], fea_out:torch.Tensor):
        return fea_out + self.layer(fea_from_in[0])


# slip: the guide's YAML gives Skip a `prehook:` layer, where nothing has left the layer yet and fea_out is None
class SkipIn(Skip):

    def forward(self, fea_from_in:Tuple[torch.Tensor], fea_in:Tuple[torch.Tensor], fea_out:torch.Tensor):
        return fea_in[0] + self.layer(fea_from_in[0])


class ControlNetPlugin(MultiPluginBlock):

    def __init__(self, name:str, from_layers: List[Dict[str, Any]], to_layers: List[Dict[str, Any]], host_model: UNet2DConditionModel=None,
                 cond_block_channels=(3, 16, 32, 96, 256, 320),
                 layers_per_block=2, block_out_channels: Tuple[int] = (320, 640, 1280, 1280)):
        super().__init__(name, from_layers, to_layers, host_model=host_model)

        # 接受图片控制条件输入
        self.register_input_feeder_to(host_model)

        #模型定义
        # filled in
        config = {key: host_model.config[key] for key in ('cross_attention_dim', 'attention_head_dim', 'norm_num_groups')}
        self.net = ControlNetModel(**config, layers_per_block=layers_per_block, block_out_channels=block_out_channels,
                                   conditioning_channels=cond_block_channels[0],
                                   conditioning_embedding_out_channels=cond_block_channels[1:-1])

    def feed_input_data(self, data): # get the condition image
        if isinstance(data, dict):
            self.cond = data['cond']
        # end

    #根据 ControlNet 特性，重写输入输出层数据处理方式
    def from_layer_hook(self, host, fea_in:Tuple[torch.Tensor], fea_out:Tuple[torch.Tensor], idx: int):
        if idx==0:
            self.data_input = fea_in
        elif idx==1:
            self.feat_to = self(*self.data_input)

    def to_layer_hook(self, host, fea_in:Tuple[torch.Tensor], fea_out:Tuple[torch.Tensor], idx: int):
        if idx == 5:
            sp = fea_in[0].shape[1]//2
            new_feat = fea_in[0].clone()
            new_feat[:, sp:, ...] = fea_in[0][:, sp:, ...] + self.feat_to[0]
            return (new_feat, fea_in[1])
        elif idx == 3:
            return (fea_out[0], tuple(fea_out[1][i] + self.feat_to[(idx) * 3 + i+1] for i in range(2)))
        elif idx == 4:
            return fea_out + self.feat_to[11+1]
        else:
            return (fea_out[0], tuple(fea_out[1][i]+self.feat_to[(idx)*3+i+1] for i in range(3)))

    # ControlNet正常forward
    def forward(
            self,
            sample: torch.FloatTensor,
            timestep: Union[torch.Tensor, float, int],
            encoder_hidden_states: torch.Tensor,
            class_labels: Optional[torch.Tensor] = None,
            timestep_cond: Optional[torch.Tensor] = None,
            attention_mask: Optional[torch.Tensor] = None,
            cross_attention_kwargs: Optional[Dict[str, Any]] = None,
    ) -> Tuple:
        # filled in
        controlnet_down_block_res_samples, mid_block_res_sample = self.net(
            sample, timestep, encoder_hidden_states, self.cond, return_dict=False)
        controlnet_down_block_res_samples = tuple(controlnet_down_block_res_samples)
        # end
        return controlnet_down_block_res_samples + (mid_block_res_sample,)


class PReLUPatchContainer(PatchPluginContainer):
    def forward(self, *args, **kwargs):
        output = 0.0
        for name in self.plugin_names:
            output = getattr(self, name).post_forward(output, *args, **kwargs)
        return output


class PReLUPatch(PatchPluginBlock):
    container_cls = PReLUPatchContainer
    def __init__(self, *args, p=0.2, **kwargs):
        super().__init__(*args, **kwargs)
        self.act = nn.PReLU(init=p)  # slip: the guide writes nn.PReLU(p), whose first argument is a count

    def post_forward(self, output, x):
        return output + self.act(x)


class PReLUPatchEverywhere(PReLUPatch):
    wrapable_classes = (nn.SiLU,)
